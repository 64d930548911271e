"""Whole fleets in one process: real protocol machines on a seeded heap, and models beyond them.

    mesh testnet sim                                        command.py
    network.py parking.py workload.py                       who is where, when, and asks for what
    world.py  measured.py                                   a fleet at work, and what is measured
    mesh.py  site.py disk.py virtual.py counting.py         heap, links, gossip, one machine's room
    frames.py trace.py roster.py                            counting, the digest, who is there
    faults.py liars.py invariants.py seeds.py               storms over small meshes, lies
    oracles.py                                              what no real scheduler can know
    fleet.py rendezvous_map.py                              a vectorised model, 10^4 to 10^7 cars
    result.py report.py charts.py                           one run's figures; all as one page

No placement decision lives here: `meshnode.protocol` decides, and neither an oracle nor the
vectorised model is the mesh. Everything follows from arguments and a seed, under any
PYTHONHASHSEED: no set of bytes or text is iterated.
"""
