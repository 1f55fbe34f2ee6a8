import gc
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and what they start inherits this
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, and DETERMINISTIC needs it
# a shell's background job ignores it, and so would what the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(50_000, 20, 20)  # what the imports hold is large, and looking through it again finds nothing


def pytest_configure(config):
    """Under -n the process that hands the tests out runs none, and need not wait for torch."""
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
