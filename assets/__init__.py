"""So that `from assets import figures` finds this folder, whatever else is installed."""
