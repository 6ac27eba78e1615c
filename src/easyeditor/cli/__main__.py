"""`python -m easyeditor.cli`, the same as `easyedit`."""

from easyeditor.cli import main

main()
