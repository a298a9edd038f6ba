package main

import (
	"cmp"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/disks"
	"github.com/silo-nbd/silo-nbd/internal/identity"
	"github.com/silo-nbd/silo-nbd/internal/inspect"
)

func newInspectCommand() *cobra.Command {
	var asJSON bool
	var where, state string
	cmd := &cobra.Command{
		Use:   "inspect DISK",
		Short: "Say what is here of a disk that is being received",
		Long: `Reads the map beside a disk that dest receives or has received, and changes nothing:
where it comes from, how much of it is here, what is missing, and whether the disk can be
used without silo-nbd. Of a disk that a source here has handed off it says to which device.`,
		Args: arguments("DISK"),
		RunE: func(cmd *cobra.Command, args []string) error {
			report, err := inspect.Disk(args[0], cmp.Or(where, disks.FindMap(args[0])), state)
			if err != nil {
				return err
			}
			if asJSON {
				return report.WriteJSON(cmd.OutOrStdout())
			}
			return report.WriteText(cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&where, "map", "", "the map is at `PATH` (default: DISK"+disks.MapSuffix+")")
	cmd.Flags().StringVar(&state, "state", "", "the state file of a source of the disk is at `PATH` (default: DISK"+identity.Suffix+")")
	return cmd
}
