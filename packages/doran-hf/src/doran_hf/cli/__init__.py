"""The subcommands that this package adds to the `doran` command."""
