"""``python -m doran_core.cli``, the same as `doran`."""

from doran_core.cli.main import main

raise SystemExit(main())
