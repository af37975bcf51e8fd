"""A pressure gauge on a serial port, as a Nexus service."""
