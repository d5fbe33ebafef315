"""Facts: what the machines and the model are. Planning uses the records here without importing torch."""
