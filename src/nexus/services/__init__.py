"""The services: one module or package each, which imports no other service and no kernel."""
