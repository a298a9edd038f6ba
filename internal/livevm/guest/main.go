// Command guest is the workload of scripts/live-vm, inside the virtual machine. It mounts the disk and writes records,
// each of which it flushes and then names on its standard output, until a line comes in; then it mounts the disk anew,
// so that nothing comes from the machine's memory, and verifies all of it.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/livevm/record"
)

const (
	disk = "/dev/vda"
	dir  = "/mnt"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

// run takes the sum of the file that nobody writes, and the time between two records.
func run(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("usage: guest CRC32C PAUSE")
	}
	sum, err := strconv.ParseUint(args[0], 16, 32)
	if err != nil {
		return err
	}
	pause, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := mount(); err != nil {
		return err
	}
	enough := make(chan error, 1)
	go func() {
		_, err := bufio.NewReader(in).ReadString('\n')
		enough <- err
	}()
	last, err := write(out, pause, enough)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "wrote %d\n", last)
	if err := unmount(); err != nil {
		return err
	}
	if err := mount(); err != nil {
		return err
	}
	if err := verify(out, last, uint32(sum)); err != nil {
		return err
	}
	return unmount()
}

func mount() error {
	if err := syscall.Mount(disk, dir, "ext4", 0, "errors=remount-ro"); err != nil {
		return fmt.Errorf("mount %s: %w", disk, err)
	}
	return nil
}

func unmount() error {
	if err := syscall.Unmount(dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", disk, err)
	}
	return nil
}

// write writes until it is enough; last is the number of the last record. With each record it says how many
// microseconds after the one before it was done, by the guest's clock.
func write(out io.Writer, pause time.Duration, enough <-chan error) (last int64, err error) {
	f, err := os.OpenFile(dir+"/records", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// So that the records lie on the disk as they do in the file.
	if err := syscall.Fallocate(int(f.Fd()), 0, 0, record.FileSize()); err != nil {
		return 0, fmt.Errorf("fallocate: %w", err)
	}
	p := make([]byte, record.Size)
	for before := time.Now(); ; {
		record.Fill(p, last+1)
		for _, off := range record.Places(last + 1) {
			if _, err := f.WriteAt(p, off); err != nil {
				return last, err
			}
		}
		if err := f.Sync(); err != nil {
			return last, err
		}
		last++
		now := time.Now()
		fmt.Fprintf(out, "r %d %d\n", last, now.Sub(before).Microseconds())
		before = now
		select {
		case err := <-enough:
			return last, err
		case <-time.After(pause):
		}
	}
}

// verify reads all of the disk that anybody cares for.
func verify(out io.Writer, last int64, sum uint32) error {
	f, err := os.Open(dir + "/records")
	if err != nil {
		return err
	}
	defer f.Close() // only read
	places, bad, err := record.Verify(f, last, 0, func(s string) { fmt.Fprintln(out, "bad", s) })
	if err != nil {
		return err
	}
	cold, err := os.Open(dir + "/cold")
	if err != nil {
		return err
	}
	defer cold.Close() // only read
	crc := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	n, err := io.CopyBuffer(struct{ io.Writer }{crc}, struct{ io.Reader }{cold}, make([]byte, 1<<20))
	if err != nil {
		return err
	}
	if crc.Sum32() != sum {
		bad++
		fmt.Fprintf(out, "bad the file that nobody wrote has the sum %08x, not %08x\n", crc.Sum32(), sum)
	}
	fmt.Fprintf(out, "verified %d places %d bytes %d mismatches\n", places, n, bad)
	return nil
}
