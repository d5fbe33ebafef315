"""Words: how records are shown to a person at a terminal: tables, heat maps, progress. Only ``cli`` imports it."""
