package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/qmp"
)

// bootTime bounds one boot.
const bootTime = 3 * time.Minute

// bootImage is what scripts/guest builds: a stock kernel, and an initramfs that mounts the first disk and runs its init.
type bootImage struct{ kernel, initramfs, busybox string }

// guestImage has scripts/guest prepare what a guest needs, which it keeps. lacks says why there can be none.
func guestImage(ctx context.Context) (image bootImage, lacks string, err error) {
	script := filepath.Join("scripts", "guest")
	if _, err := os.Stat(script); err != nil {
		return image, "it is not run in the repository, where scripts/guest is", nil
	}
	for _, name := range []string{"mkfs.ext4", "nbdkit", "qemu-img", "go"} {
		if !have(name) {
			return image, name + " is not installed", nil
		}
	}
	if said, _, err := output(ctx, "sh", "-c", script+" --check || true"); err != nil || said != "" {
		return image, strings.TrimSpace(said), err
	}
	said, _, err := output(ctx, script, "--prepare")
	dir, _, _ := strings.Cut(said, " (")
	return bootImage{filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "base.cpio"), filepath.Join(dir, "busybox")}, "", err
}

// machineOf starts a virtual machine that boots from a drive, which is a value of qemu's -drive. Its console is the
// child's standard output. The socket, if there is one, is where it takes commands.
func (b *bench) machineOf(ctx context.Context, image bootImage, drive, socket string) (*child, error) {
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none", "-monitor", "none", "-nic", "none",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512", "-device", "virtio-rng-pci",
		"-kernel", image.kernel, "-initrd", image.initramfs, "-append", "console=ttyS1,115200 loglevel=4 panic=-1 no_timer_check silo.boot",
		"-serial", "stdio", "-serial", "file:" + filepath.Join(b.memory, "console"),
		"-drive", drive,
	}
	if socket != "" {
		args = append(args, "-qmp", "unix:"+socket+",server=on,wait=off")
	}
	return startChild(ctx, "qemu-system-x86_64", args...)
}

// says waits for a line of the machine's console.
func (b *bench) says(vm *child, prefix string) error {
	late := time.After(bootTime)
	for {
		select {
		case line, ok := <-vm.lines:
			switch {
			case !ok, strings.HasPrefix(line, bootBad):
				console, _ := os.ReadFile(filepath.Join(b.memory, "console")) // it may not have come so far
				vm.stop()
				return fmt.Errorf("the guest ended without %q: %s\n%s\n%s", prefix, line, vm.stderr.String(), console)
			case strings.HasPrefix(line, prefix):
				return nil
			}
		case <-late:
			return fmt.Errorf("the guest: no line %q within %v", prefix, bootTime)
		}
	}
}

// blockStream has the machine fill its disk from the one behind it.
func blockStream(ctx context.Context, socket, drive string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := waitListening("unix://" + socket); err != nil {
		return err
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	client, err := qmp.New(ctx, conn)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.Execute(ctx, "block-stream", map[string]string{"device": drive, "job-id": "stream"}, nil)
}
