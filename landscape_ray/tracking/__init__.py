"""Where results live and how they get out: sweep folders, Parquet parts, the MLflow projection, collecting tables.

The sweep folder is the truth, Parquet parts are its spool, MLflow is a projection of both: workers only write files,
and one thread of the driver copies committed rows to MLflow. Beside it there may be a storage that every machine
reaches: `storage.py` says what is in it, `mirror.py` and `driver_mirror.py` how a sweep gets there, `cache.py` how it
comes back. This is the only package that imports mlflow.
"""

import os

# MLflow reads this once, when it is first imported; nothing here should report its use to anybody unasked.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Otherwise it prints two lines for every run that ends on a server, in the middle of a live display.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
