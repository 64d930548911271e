"""The car's readings: adapters that only read. No decision, no position, no write.

Under `meshnode.node`, which turns a `VehicleState` into a budget by `meshnode.protocol.budget`.
"""
