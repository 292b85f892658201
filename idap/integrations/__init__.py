"""IDAP's scores inside other pruners. Each module needs its own library, and none is imported before it is asked for."""
