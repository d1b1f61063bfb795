"""The commands of `distcls`: parse, call, print."""
