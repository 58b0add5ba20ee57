"""The pieces of gpu_suite.py, one module a stage or a part of one."""
