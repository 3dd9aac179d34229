"""The packaged recipes, YAML files."""
