//go:build integration

package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/livevm"
)

// TestRunningMachineMoves moves a running virtual machine from one QEMU to another, memory and disk: at first the move
// is given up when the machine has been stopped for it, and the guest goes on at the source; then it is made. The guest
// finds all that it has written on both hosts, and the file system is clean.
func TestRunningMachineMoves(t *testing.T) {
	o := machine(t)
	o.Abort = true
	began := time.Now()
	r, err := livevm.Move(t.Context(), o)
	if err != nil {
		t.Fatalf("%v\n%v", err, r)
	}
	t.Logf("%v", r)
	if r.GivenUp == 0 || r.Handoff == 0 || r.Stopped < r.Handoff || r.Pause < r.Stopped/2 {
		t.Errorf("the times cannot be: %+v", r)
	}
	if r.DiskBefore < o.Cold/2 || r.DiskAfter == 0 || r.Memory < 10*mib {
		t.Errorf("that much cannot have travelled: %+v", r)
	}
	t.Logf("pause of the guest %v, handoff %v, %d records, %d mismatches, in %v",
		r.Pause.Round(time.Millisecond), r.Handoff.Round(time.Millisecond), r.Records, r.Mismatches, time.Since(began).Round(time.Second))
}

// TestMemoryIsLostAfterTheHandoff kills the QEMU at the destination when the disk is there and the memory is not: the
// guest, which goes on at the source, gets no write through, and what it was told is written is at the destination.
func TestMemoryIsLostAfterTheHandoff(t *testing.T) {
	o := machine(t)
	o.Rate = "20MiB" // so that a part of the disk is still at the source
	r, err := livevm.Lose(t.Context(), o)
	if err != nil {
		t.Fatalf("%v\n%+v", err, r)
	}
	if r.Places == 0 || r.Mismatches > 0 || r.DiskAfter == 0 {
		t.Errorf("that was not verified: %+v", r)
	}
	t.Logf("%d records, %d mismatches; %d MiB before the handoff, %d KiB after it", r.Records, r.Mismatches, r.DiskBefore/mib, r.DiskAfter/kib)
}

// machine makes what a machine that is to be moved needs.
func machine(t *testing.T) livevm.Options {
	t.Helper()
	need(t, livevm.Tools...)
	needGuest(t)
	o := livevm.Defaults()
	prepared := must(t, guestTime, filepath.Join(top(), "scripts", "guest"), "--prepare")
	image, _, _ := strings.Cut(prepared, " (")
	o.Image(image)
	o.SiloNBD, o.Guest = siloNBD(t), filepath.Join(scratch, "livevm-guest")
	static := exec.Command("go", "build", "-buildvcs=false", "-o", o.Guest, "./internal/livevm/guest")
	static.Dir, static.Env = top(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := static.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	var err error
	if o.Dir, err = os.MkdirTemp("", "live-vm-"); err != nil { // with a name short enough for sockets
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(o.Dir); err != nil {
			t.Error(err)
		}
	})
	return o
}
