"""Jobs on a cluster that is not this machine: checked here, packed, sent to Ray's job server, followed, found again."""
