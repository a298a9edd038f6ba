package main

import (
	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/disks"
)

// destFlags is the command line of dest.
type destFlags struct {
	wire      wireFlags
	disks     []string
	maps      []string
	dir       string
	overwrite bool
	moved     bool
	nbd       nbdFlag
	readOnly  bool
	stall     stallFlag
	memory    memoryFlag
	exit      bool
	command   string
	operate   operateFlags
	format    logFormat
}

func newDestCommand() *cobra.Command {
	f := &destFlags{}
	cmd := &cobra.Command{
		Use:   "dest (--disk [NAME=]PATH ... | --dir DIR) (--connect ADDR | --listen ADDR) --nbd ADDR",
		Short: "Receive disks and serve them over NBD from the first second",
		Long: `Receives disks from a source and serves them over NBD at once. Prints a line

  ready NAME URI

for each disk as soon as it can be attached, NAME escaped as in the URI. Reads of blocks that have not arrived wait
for them and ask the source for them; writes never wait. When all is complete it serves
on until SIGTERM, unless --exit-when-complete or --run is given.

A single --disk without a NAME takes the name that the source gives its disk; several,
and one with a NAME, are found by their names. A disk that does not exist is made; one
that does needs --overwrite.

Beside each disk lies a map, PATH.silo-nbd, that knows which blocks are here. After a
crash the same command (without --overwrite) goes on: what is here is served at once. For
a block device --map says where the map lies; without it nothing is remembered.

With --run, COMMAND is run by /bin/sh when every disk is ready, with the export's URI in
$uri (and that of each disk in $uri_NAME). dest ends when the command has ended, all is
complete and the last client has gone, with the command's exit code. It does not end
before all is complete, since the disk would be of no use.`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			specs, err := f.check()
			if err != nil {
				return err
			}
			c := newConsole(cmd, f.format, f.command != "")
			defer c.close()
			return unlessInterrupted(cmd.Context(), f.run(cmd.Context(), specs, c))
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&f.disks, "disk", nil, "a disk to receive, as `[NAME=]PATH`; may be given again")
	flags.StringArrayVar(&f.maps, "map", nil, "the map of a disk lies here, as `[NAME=]PATH`; may be given again (default: beside the disk; a block device has none)")
	flags.StringVar(&f.dir, "dir", "", "receive every disk that the source sends, as `DIR`/NAME.raw")
	flags.BoolVar(&f.overwrite, "overwrite", false, "begin anew: replace what a disk that exists already holds, and forget its map")
	flags.BoolVar(&f.moved, "disk-moved", false, "a disk is the one of its map although its name or times say otherwise: it was moved or copied as dest had left it")
	flags.Var(&f.nbd, "nbd", "serve NBD here: host:port, unix:///path, or systemd[:NAME] for the socket that systemd has opened")
	flags.BoolVar(&f.readOnly, "read-only", false, "let NBD clients read only")
	flags.Var(&f.stall, "stall", "what becomes of a client's read that waits for the source: it waits on, or fails with EIO after DURATION")
	flags.BoolVar(&f.exit, "exit-when-complete", false, "end when all is complete and the last client has gone")
	flags.StringVar(&f.command, "run", "", "run `COMMAND` by /bin/sh with $uri, and end when it has ended and all is complete")
	f.memory.add(cmd)
	f.wire.add(cmd)
	f.operate.add(cmd)
	f.format.add(cmd)
	return cmd
}

func (f *destFlags) check() ([]disks.Spec, error) {
	switch {
	case len(f.disks) == 0 && f.dir == "":
		return nil, usagef("no disk: want --disk [NAME=]PATH or --dir DIR")
	case len(f.disks) > 0 && f.dir != "":
		return nil, usagef("--disk and --dir: want only one of them")
	case len(f.maps) > 0 && f.dir != "":
		return nil, usagef("--map and --dir: with --dir each map lies beside its disk; name the disks with --disk")
	case f.moved && f.overwrite:
		return nil, usagef("--disk-moved and --overwrite: the one goes on with what a disk holds, the other replaces it")
	case f.nbd.IsZero():
		return nil, usagef("no --nbd: want the address at which to serve the disk, such as unix:///run/vm.sock")
	case f.command != "" && f.dir != "":
		return nil, usagef("--run and --dir: with --dir nobody knows when all disks are there; name them with --disk")
	}
	specs, err := disks.ParseSpecs(f.disks)
	if err != nil {
		return nil, usagef("--disk: %w", err)
	}
	if f.command != "" {
		if err := distinctVariables(specs); err != nil {
			return nil, err
		}
	}
	if err := disks.PlaceMaps(specs, f.maps); err != nil {
		return nil, usagef("--map: %w", err)
	}
	if err := f.wire.check(); err != nil {
		return nil, err
	}
	if err := f.memory.check(); err != nil {
		return nil, err
	}
	if err := f.operate.check(&f.wire); err != nil {
		return nil, err
	}
	return specs, f.wire.checkListener("--nbd", f.nbd.addrFlag)
}
