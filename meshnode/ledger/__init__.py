"""What must survive: signed objects, jobs and their results, blobs. Storage only, no decisions.

Under `meshnode.node`, which carries the machine's `Persist` and blob effects out through here.
"""
