//go:build integration

package integration

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

// slowDevice is a block device whose every request takes delay, and that takes few at a time.
func slowDevice(t *testing.T, size int64, delay time.Duration) string {
	t.Helper()
	need(t, "nbdkit", "qemu-storage-daemon", "losetup")
	needRoot(t)
	dir := socketDir(t)
	file, socket := filepath.Join(dir, "file"), filepath.Join(dir, "s")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(file, unix.MNT_DETACH) }) // what serves it was killed by then
	ms := fmt.Sprintf("%dms", delay.Milliseconds())
	start(t, "nbdkit", "nbdkit", "-f", "-U", socket, "--filter=delay", "memory", fmt.Sprint(size), "rdelay="+ms, "wdelay="+ms)
	waitListening(t, "unix://"+socket)
	start(t, "fuse", "qemu-storage-daemon", "--blockdev", "driver=nbd,node-name=n,server.type=unix,server.path="+socket,
		"--export", "type=fuse,id=e,node-name=n,mountpoint="+file+",writable=on")
	eventually(t, soon, "the file is there", func() bool {
		info, err := os.Stat(file)
		return err == nil && info.Size() == size
	})
	device := loopDevice(t, file)
	queue := filepath.Join("/sys/block", filepath.Base(device), "queue/nr_requests")
	if err := os.WriteFile(queue, []byte("4"), 0); err != nil {
		t.Logf("the device's queue stays as it is: %v", err)
	}
	return device
}

// TestNothingStandsStillWhileADeviceIsSlow: the queue of the device is full, so each read waits for it, and a timer beside them runs
// on, also on one processor and while garbage is collected (fault F8, trap R1).
func TestNothingStandsStillWhileADeviceIsSlow(t *testing.T) {
	const size, readers, period = 64 * mib, 16, 5 * time.Millisecond
	device := slowDevice(t, size, 300*time.Millisecond)
	f, err := sources.OpenFile(device, sources.FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, processors := range []int{1, 2} {
		t.Run(fmt.Sprint(processors), func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(processors))
			stop := make(chan struct{})
			var reading sync.WaitGroup
			for i := range readers {
				reading.Go(func() {
					r, b := rand.New(rand.NewPCG(uint64(i), uint64(processors))), make([]byte, 4096)
					for {
						select {
						case <-stop:
							return
						default:
						}
						if _, err := f.ReadAt(b, r.Int64N(size/4096)*4096); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			longest := longestGap(period, 3*time.Second)
			close(stop)
			reading.Wait()
			if longest > 100*time.Millisecond {
				t.Errorf("a timer of %v did not run for %v", period, longest)
			}
		})
	}
}

// longestGap is the longest time between two ticks of a timer of period, over a while.
func longestGap(period, during time.Duration) (longest time.Duration) {
	tick := time.NewTicker(period)
	defer tick.Stop()
	began := time.Now()
	for last := began; last.Sub(began) < during; {
		<-tick.C
		now := time.Now()
		longest = max(longest, now.Sub(last))
		last = now
		if now.Sub(began)%(500*time.Millisecond) < period {
			runtime.GC() // it stops the world, which waits for every processor
		}
	}
	return longest
}

// TestRefusedFastZeroLeavesWhatWasWritten: the device has no way to zero a range, which shows only when it is tried. What was
// written before, and is not on the device yet, is there still (fault F10).
func TestRefusedFastZeroLeavesWhatWasWritten(t *testing.T) {
	need(t, "nbdkit", "nbdfuse", "losetup")
	needRoot(t)
	dir := socketDir(t)
	file, socket, data := filepath.Join(dir, "file"), filepath.Join(dir, "s"), filepath.Join(dir, "data")
	for name, size := range map[string]int{file: 0, data: mib} {
		if err := os.WriteFile(name, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = unix.Unmount(file, unix.MNT_DETACH) }) // what serves it was killed by then
	start(t, "nbdkit", "nbdkit", "-f", "-U", socket, "eval", "get_size=echo "+fmt.Sprint(mib),
		"pread=dd if="+data+" skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
		"pwrite=dd of="+data+" seek=$4 oflag=seek_bytes conv=notrunc status=none")
	waitListening(t, "unix://"+socket)
	start(t, "nbdfuse", "nbdfuse", file, "nbd+unix:///?socket="+socket)
	eventually(t, soon, "the file is there", func() bool {
		info, err := os.Stat(file)
		return err == nil && info.Size() == mib
	})
	f, err := sources.OpenFile(loopDevice(t, file), sources.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !f.CanZeroFast() {
		t.Fatal("the device says that it cannot: this proves nothing")
	}
	want, got := bytes.Repeat([]byte{'A'}, 64*kib), make([]byte, 64*kib)
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.ZeroFastAt(8*kib, 16*kib, true); !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("a fast zero of a device that cannot do it: %v", err)
	}
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, got) {
		t.Errorf("it says that nothing has changed, and %d bytes of what was written are zero", bytes.Count(got, []byte{0}))
	}
}
