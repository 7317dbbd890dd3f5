"""A process that has imported everything and forks a run for each line it reads, so that a kill costs milliseconds and not an import.

Answers every line with the process id. An empty line asks for the exit status; until then an ended process keeps its id, so a late kill
cannot hit another one.
"""

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from faultlib import RUNS, Killing, make_source

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:  # what is imported at first use is imported here
    for name, run in RUNS.items():
        run(make_source(Path(folder) / f"{name}-source"), Path(folder) / name)
for line in sys.stdin:
    how, source, out, overwrite, at = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            with Killing(at).installed():
                RUNS[how](Path(source), Path(out), overwrite=overwrite)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
