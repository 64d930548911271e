"""A car read through an Eclipse KUKSA databroker, by the names of COVESA's VSS. Reads only.

`signals` says what each path means, `wire` what the broker's messages look like, `client` calls it,
`adapter` is what the node runs. Position, VIN and odometer are never asked for.
"""
