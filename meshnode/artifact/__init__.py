"""Artifacts of people's own functions: export, manifest, bundle.

`exporting` turns a JAX function into bytes and `signing` writes the manifest beside them;
`bundle` packs the two into one `x.mesh` and reads it strictly; `specs` reads 'f32[64,128]'. Only
`exporting` and the program `build` load jax: in the user's own process for a function, in a child
for the command line. Cars trust none of this; meshnode/worker/validate.py is what they rely on.
"""
