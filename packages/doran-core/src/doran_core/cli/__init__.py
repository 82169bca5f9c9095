"""The `doran` command. One file per subcommand; other packages add theirs by entry point."""
