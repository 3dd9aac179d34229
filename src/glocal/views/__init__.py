"""Random views that remember where each of their pixels came from."""
