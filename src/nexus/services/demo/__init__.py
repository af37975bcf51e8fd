"""The demonstration services of systems/selftest.toml."""
