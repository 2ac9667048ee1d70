"""Steps from export to export that make a model smaller. There are none yet."""
