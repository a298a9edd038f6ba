package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/nbdclient"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir"
	"github.com/silo-nbd/silo-nbd/internal/units"
	"github.com/silo-nbd/silo-nbd/internal/verify"
)

func newVerifyCommand() *cobra.Command {
	var certs string
	cmd := &cobra.Command{
		Use:   "verify A B",
		Short: "Compare two disks: files, block devices or NBD URIs",
		Long: `Compares two disks byte by byte: regular files, block devices or NBD URIs such as
nbd://host:port/name or nbd+unix:///name?socket=/path. Holes are not read. Prints one
line; exits with 0 if the disks are equal and with 1 if they differ or cannot be read.

URIs of nbds:// and nbds+unix:// need --tls.`,
		Args: arguments("A", "B"),
		RunE: func(cmd *cobra.Command, args []string) error {
			secure, err := clientTLS(certs)
			if err != nil {
				return err
			}
			return runVerify(cmd.Context(), args[0], args[1], secure, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&certs, "tls", "", "the ca-cert.pem, cert.pem and key.pem for NBD servers with TLS are in `DIR`")
	return cmd
}

// clientTLS is how to connect with the certificates of dir; nil if there is none.
func clientTLS(dir string) (nbdclient.Secure, error) {
	if dir == "" {
		return nil, nil
	}
	certs, err := tlsdir.Open(dir, tlsdir.Options{Dial: true})
	if err != nil {
		return nil, fmt.Errorf("--tls: %w", err)
	}
	return certs.Client, nil
}

func runVerify(ctx context.Context, nameA, nameB string, secure nbdclient.Secure, stdout io.Writer) error {
	a, err := verify.Open(ctx, nameA, secure)
	if err != nil {
		return unlessInterrupted(ctx, err)
	}
	defer a.Close() // only read from
	b, err := verify.Open(ctx, nameB, secure)
	if err != nil {
		return unlessInterrupted(ctx, err)
	}
	defer b.Close()                         // only read from
	stop := context.AfterFunc(ctx, func() { // wakes a read that waits for a block
		a.Close()
		b.Close()
	})
	defer stop()

	r, err := verify.Compare(ctx, a, b, verify.Options{})
	switch {
	case ctx.Err() != nil:
		return interruptedf("%s and %s were not compared to the end", nameA, nameB)
	case err != nil:
		return err
	case r.Equal():
		_, err = fmt.Fprintf(stdout, "equal: %d bytes\n", r.SizeA)
		return err
	}
	if _, err := fmt.Fprintln(stdout, difference(r)); err != nil {
		return err
	}
	return &exitError{exitFailure}
}

// difference says in one line how two disks differ.
func difference(r verify.Result) string {
	line := "differ:"
	if r.SizeA != r.SizeB {
		line += fmt.Sprintf(" A has %d bytes and B %d;", r.SizeA, r.SizeB)
	}
	if r.Differing == 0 {
		return line + fmt.Sprintf(" the first %d bytes are equal", r.Compared)
	}
	return line + fmt.Sprintf(" first at byte %d (%#02x in A, %#02x in B), in %d of %d blocks of %s",
		r.First, r.A, r.B, r.Differing, r.Blocks, units.Format(verify.BlockSize))
}
