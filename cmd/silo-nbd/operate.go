package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/internal/metrics"
	"github.com/silo-nbd/silo-nbd/internal/systemd"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir"
	"github.com/silo-nbd/silo-nbd/internal/units"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// statusInterval is how often the service manager is told how far we are.
const statusInterval = 5 * time.Second

// operateFlags are those for who watches and steers a running source or dest.
type operateFlags struct {
	control string
	metrics addrFlag
}

func (o *operateFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.control, "control", "", "listen for silo-nbd status, pause and so on at the unix socket `PATH`")
	cmd.Flags().Var(&o.metrics, "metrics", "serve metrics for Prometheus here, at /metrics: host:port or unix:///path")
}

func (o *operateFlags) check(w *wireFlags) error {
	if o.control != "" {
		if _, err := addr.Unix(o.control); err != nil {
			return usagef("--control: %w", err)
		}
	}
	return w.checkListener("--metrics", o.metrics)
}

// operator is what serves those who watch and steer this process.
type operator struct {
	console *console
	monitor *control.Monitor
	control *control.Server // nil: nobody steers
	metrics *metrics.Server // nil: nobody scrapes
	cancel  context.CancelFunc
	loops   sync.WaitGroup
}

// start begins to serve. Close what it returns.
func (o *operateFlags) start(ctx context.Context, opts control.Options, see metrics.Sight, certs *tlsdir.Dir, c *console) (*operator, error) {
	opts.Version = version()
	see.Role, see.Version = opts.Role, opts.Version
	op := &operator{console: c, monitor: control.NewMonitor(opts)}
	var err error
	if o.control != "" {
		var ln net.Listener
		if ln, err = control.Listen(ctx, o.control); err != nil {
			return nil, fmt.Errorf("--control: %w", err)
		}
		op.control = control.Start(ln, op.monitor, c.log)
	}
	if !o.metrics.IsZero() {
		if op.metrics, err = o.serveMetrics(ctx, see, certs, c); err != nil {
			return nil, errors.Join(fmt.Errorf("--metrics: %w", err), op.close())
		}
	}
	loop, cancel := context.WithCancel(context.Background()) // also while we end
	op.cancel = cancel
	op.loops.Go(func() { op.monitor.Run(loop) })
	if systemd.Notified() {
		op.loops.Go(func() { op.tellLoop(loop) })
	}
	return op, nil
}

// serveMetrics serves them in plain text where only this host reaches them, and
// else as everything else is.
func (o *operateFlags) serveMetrics(ctx context.Context, see metrics.Sight, certs *tlsdir.Dir, c *console) (*metrics.Server, error) {
	ln, err := o.metrics.Listen(ctx)
	if err != nil {
		return nil, err
	}
	c.log.Info("metrics", "listen", listenAddr(ln))
	if certs != nil && !o.metrics.IsLocal() {
		ln = tlsListener(ln, certs)
	}
	return metrics.Start(ln, see, c.log), nil
}

// tellLoop tells the service manager how far we are.
func (op *operator) tellLoop(ctx context.Context) {
	tick := time.NewTicker(statusInterval)
	defer tick.Stop()
	for last := ""; ; {
		if line := summary(op.monitor.Status()); line != last {
			op.told(systemd.Status(line))
			last = line
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// ready tells the service manager that this process does what it is for.
func (op *operator) ready() { op.told(systemd.Ready()) }

// stopping tells it that the end has begun.
func (op *operator) stopping() { op.told(systemd.Stopping()) }

// told says if the service manager could not be told; that changes nothing.
func (op *operator) told(err error) {
	if err != nil {
		op.console.log.Warn("not told", "error", err)
	}
}

// Close ends what start began.
func (op *operator) Close() error {
	op.cancel()
	err := op.close()
	op.loops.Wait()
	return err
}

func (op *operator) close() error {
	var errs []error
	if op.control != nil {
		errs = append(errs, op.control.Close())
	}
	if op.metrics != nil {
		errs = append(errs, op.metrics.Close())
	}
	return errors.Join(errs...)
}

// summary is the status in one line.
func summary(st control.Status) string {
	if len(st.Disks) == 0 {
		return "waiting for a source"
	}
	lines := make([]string, len(st.Disks))
	for i, d := range st.Disks {
		lines[i] = fmt.Sprintf("%s: %s, %d %% of %s", d.Name, control.Words(d), d.Percent, units.Human(d.Size))
	}
	return strings.Join(lines, "; ")
}

// samples is what control wants to know of disks.
func samples(status func() []migrate.DiskStatus) func() []control.Sample {
	return func() []control.Sample {
		all := status()
		out := make([]control.Sample, len(all))
		for i, d := range all {
			out[i] = control.Sample{DiskStatus: d}
		}
		return out
	}
}
