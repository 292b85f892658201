"""IDAP's scores inside other pruners. Each module imports its own library; none is imported before it is used."""
