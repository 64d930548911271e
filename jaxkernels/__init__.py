"""Kernels that come with the mesh: pure array functions, named, versioned and committed as bytes.

Flow: `registry` says what there is, a kernel's `host` turns a person's input into units, cars run
the committed `jax.export` bytes of `artifacts/`, and `host` turns the outputs back. Only `export`,
`build` and each kernel's `kernel` and `bench` import jax; nothing here imports meshnode.
"""
