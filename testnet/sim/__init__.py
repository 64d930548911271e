"""The fleet in one process: real protocol machines under a seeded heap of events.

    mesh testnet sim                                command.py
    world.py     a fleet, its tasks, what is measured       seeds.py   small meshes, many faults
    mesh.py      heap, links, gossip, effects      oracles.py  what no real scheduler can know
    site.py disk.py virtual.py                     what is around one machine
    network.py   where cars are, how far apart     faults.py invariants.py trace.py counting.py

No placement decision lives here: `meshnode.protocol` decides, and an oracle is not the mesh.
Everything follows from the seed, under any PYTHONHASHSEED: no set of bytes or text is iterated.
"""
