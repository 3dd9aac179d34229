"""Recipes, and the whole road from data to table."""
