"""Code that all operations share: backend choice, argument checks, profiler ranges, compilation."""
