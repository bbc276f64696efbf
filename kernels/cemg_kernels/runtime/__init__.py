"""What the operations share: backend choice, profiler ranges, argument checks, ahead-of-time compilation."""
