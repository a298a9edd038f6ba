package main

import (
	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/demo"
	"github.com/silo-nbd/silo-nbd/internal/units"
)

func newDemoCommand() *cobra.Command {
	var keep string
	size, rate := units.Size(demo.DefaultSize), units.Size(0)
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Move a disk on this machine, use it meanwhile, and show what that is like",
		Long: `Makes a disk of real files, moves it over a link that is held to a rate, and reads
and writes it meanwhile through the NBD export. Prints what was promised and what
was seen; exits with 1 if anything did not hold. Needs no root and no other program.`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if size < demo.MinSize {
				return usagef("--size: %q is too small to show anything: want at least %s", size.String(), units.Format(demo.MinSize))
			}
			err := demo.Run(cmd.Context(), demo.Options{Size: int64(size), Rate: int64(rate), Keep: keep, Out: cmd.OutOrStdout()})
			if cmd.Context().Err() != nil {
				return interruptedf("the demo was not shown to the end")
			}
			return err
		},
	}
	cmd.Flags().Var(&size, "size", "size of the disk")
	cmd.Flags().Var(&rate, "rate", "bytes per second over the link (default: so that the move lasts about 15s)")
	cmd.Flags().StringVar(&keep, "keep", "", "leave the disks in the directory `DIR`")
	return cmd
}
