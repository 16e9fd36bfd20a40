"""``python -m dalr_scale COMMAND``, and ``accelerate launch -m dalr_scale COMMAND``."""

from dalr_scale.cli import main

raise SystemExit(main())
