"""The kernels: `sim` and `linux` keep the promises of `abi`; `core` is what they share."""
