"""One module per service: its messages, limits and statuses, declared once."""
