"""A pump with an interlock, as Nexus services."""
