def export(fn, specs):
    import jax
    from jaxkernels.export import export_bytes
    with jax.enable_x64(any(s.dtype in ("float64","int64","uint64") for s in specs)):
        return export_bytes(fn, specs)
