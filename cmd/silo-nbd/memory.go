package main

import (
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/cgroup"
	"github.com/silo-nbd/silo-nbd/internal/units"
	"github.com/silo-nbd/silo-nbd/pkg/nbdexport"
)

const (
	// wireMemory is what the other end of a migration may have us hold.
	wireMemory = 64 << 20
	// connectionMemory is what an NBD connection may hold beyond the budget.
	connectionMemory = 320 << 10
	// budgetOfConnection is how much of the NBD budget there is for each
	// connection that is let in.
	budgetOfConnection = 256 << 10
	// leastMemory leaves the NBD server one request of the largest size, and
	// mostMemory its own defaults.
	leastMemory = 184 << 20
	mostMemory  = 1 << 30
	// ownMemory is what we need ourselves, whatever others do.
	ownMemory = 32 << 20
)

// memoryFlag bounds what clients and the other end can make this process hold.
type memoryFlag units.Size

func (m *memoryFlag) add(cmd *cobra.Command) {
	cmd.Flags().Var((*units.Size)(m), "memory", "most that NBD clients and the other end may make this process hold (default: 1GiB, or 3/4 of the control group's limit if that is less)")
}

func (m memoryFlag) check() error {
	if m != 0 && m < leastMemory {
		size := units.Size(m)
		return usagef("--memory: %s is too little: want at least %s", size.String(), units.Format(leastMemory))
	}
	return nil
}

// apply sets the limits of an NBD server, and of Go's heap unless GOMEMLIMIT says
// more of that.
func (m memoryFlag) apply(options *nbdexport.Options, log *slog.Logger) {
	limit := cgroup.MemoryLimit(os.DirFS("/"))
	total := int64(m)
	if total == 0 {
		total = mostMemory
		if limit > 0 {
			total = min(total, limit/4*3)
		}
	}
	if total < leastMemory {
		log.Warn("the control group allows little memory: clients may have this process killed",
			"limit", units.Human(limit), "want", units.Human((leastMemory+2)/3*4))
		total = leastMemory
	}
	options.MemoryBudget, options.MaxConnections = nbdLimits(total)
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(total + ownMemory)
	}
}

// nbdLimits deals out what there is beside the wire: the budget of the NBD server
// counts two and a half times (see nbdexport.Options), and each connection besides.
func nbdLimits(total int64) (budget int64, connections int) {
	budget = (total - wireMemory) * 4 / (10 + 4*connectionMemory/budgetOfConnection)
	return budget, int(budget / budgetOfConnection)
}
