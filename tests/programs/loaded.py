"""Which modules each of some imports brings: `loaded.py MODULE MODULE:NAME,NAME ...`, one line of JSON for each.

By its path it needs nothing of this repository; a module's names are asked for after it, since some come when asked.
"""

import importlib
import json
import sys

if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        before = set(sys.modules)
        name, _, names = wanted.partition(":")
        module = importlib.import_module(name)
        for each in filter(None, names.split(",")):
            getattr(module, each)
        print(json.dumps(sorted(set(sys.modules) - before)))
