"""Artifacts of people's own functions: export, manifest, bundle, verdict.

`exporting` turns a JAX function into bytes; `bundle` writes the signed manifest beside them into
one `x.mesh` and reads it strictly; `specs` reads 'f32[64,128]'; `building` and `checking` run the
programs `build` here and `check` of the worker for the command line. Only `exporting` and `build`
load jax: in the user's own process for a function, in a child for the CLI. Cars trust none of
this; meshnode/worker/validate.py is what they rely on.
"""
