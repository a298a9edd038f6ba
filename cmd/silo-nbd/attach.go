package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/attach"
	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
)

// deviceFlag is a device of the kernel's NBD client, or any that is free.
type deviceFlag struct{ attach.Device }

func (d *deviceFlag) Set(s string) (err error) {
	if s == "auto" {
		d.Device = attach.Auto
		return nil
	}
	d.Device, err = attach.ParseDevice(s)
	return err
}

func (d *deviceFlag) String() string {
	if d.Device == attach.Auto {
		return "auto"
	}
	return d.Device.String()
}

func (*deviceFlag) Type() string { return "/dev/nbdN|auto" }

func newAttachCommand() *cobra.Command {
	var opts attach.Options
	device := deviceFlag{attach.Auto}
	cmd := &cobra.Command{
		Use:   "attach URI",
		Short: "Make an NBD export a block device of this host",
		Long: `Makes the export that an NBD URI names, such as dest's ready line has, a block device
of this host, with the kernel's own NBD client (modprobe nbd), and prints

  attached /dev/nbd0

when that can be used. Needs root. Nothing of silo-nbd has to run for it from then on.

When dest was started again, the same command with --device of the device that is in
use gives it new connections, and what waited goes on.`,
		Args: arguments("URI"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.Device = device.Device
			if err := opts.Check(); err != nil {
				return usagef("%w", err)
			}
			if _, err := nbdclient.ParseURI(args[0]); err != nil {
				return usagef("%w", err)
			}
			r, err := attach.Attach(cmd.Context(), args[0], opts)
			if err != nil {
				return fmt.Errorf("attach: %w", err)
			}
			if r.Unread {
				// As below.
				fmt.Fprintf(cmd.ErrOrStderr(), "the export has not shown its partition table yet: if that was made for blocks of 4096 bytes, detach %v, and attach it again with --block-size 4096\n", r.Device)
			}
			if r.Cut > 0 {
				// Nobody is left to tell if this fails.
				fmt.Fprintf(cmd.ErrOrStderr(), "the export's last %d bytes are no whole block: %v ends before them\n", r.Cut, r.Device)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "attached", r.Device)
			return err
		},
	}
	f := cmd.Flags()
	f.Var(&device, "device", "the device; auto takes one that is free")
	f.IntVar(&opts.BlockSize, "block-size", 0, "size of the device's blocks in `BYTES`, 512 to 4096; 0 is what its partition table (GPT) was made for, and otherwise 512")
	f.IntVar(&opts.Connections, "connections", 1, "how many `CONNECTIONS` there are; several need --timeout")
	f.DurationVar(&opts.Timeout, "timeout", 0, "take a connection for dead when an answer takes longer; 0s waits for ever, as dest does")
	f.DurationVar(&opts.DeadTimeout, "dead-timeout", 10*time.Minute, "how long requests wait for new connections when dest has ended, before they fail")
	return cmd
}

func newDetachCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "detach DEVICE",
		Short: "Let go of a block device that attach has made",
		Long: `Ends the connections of a device of the kernel's NBD client, whoever made them.
A device that is mounted or otherwise in use is refused. Needs root.`,
		Args: arguments("DEVICE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := attach.ParseDevice(args[0])
			if err != nil {
				return usagef("%w", err)
			}
			if err := attach.Detach(cmd.Context(), d, force); err != nil {
				return fmt.Errorf("detach: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also when it is in use: what it is asked for fails from then on")
	return cmd
}
