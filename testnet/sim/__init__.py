"""Whole fleets without machines: what placement costs at sizes that nobody has.

    network    where cars are and how far apart            who is how far
    parking    when a car stands, and until when           who is there
    fleet      a vectorised model, 10^4 to 10^7 cars       `python -m testnet.sim.fleet`
    result     what one run says                           every model fills it
    report     results as one page to look at              `write_report`

Everything here is a pure function of its arguments and a seed: no clock, no network, no process.
"""
