"""kombu's classes are there only when `.ci/conformance.sh` runs; a plain pytest passes this directory by."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("t") else ["test_kombu_conformance.py"]
