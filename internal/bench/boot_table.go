package main

import (
	"fmt"
	"strings"
)

// bootMedian is the median of each figure.
func bootMedian(all []bootFigures) (m bootFigures) {
	of := func(figure func(bootFigures) float64) float64 {
		values := make([]float64, len(all))
		for i, f := range all {
			values[i] = figure(f)
		}
		return median(values)
	}
	for i := range m.took {
		m.took[i] = of(func(f bootFigures) float64 { return f.took[i] })
		m.local[i] = of(func(f bootFigures) float64 { return f.local[i] })
		m.crossed[i] = of(func(f bootFigures) float64 { return f.crossed[i] })
	}
	m.reads = of(func(f bootFigures) float64 { return f.reads })
	m.waited = of(func(f bootFigures) float64 { return f.waited })
	return m
}

// bootBound is the goal for ours, in seconds, at moment i: bootGoal times the local boot and the time that the link takes
// for what the machine has read until then, which is what crossed to the one without anything local. No round trip is
// in it.
func bootBound(local, plain bootFigures, i int) float64 {
	return bootGoal * (local.took[i] + plain.crossed[i]*1e6/bootRate)
}

// bootTable is the rows of bootWays, and what they mean.
func bootTable(rows []bootFigures) string {
	var t strings.Builder
	fmt.Fprintf(&t, "   %-36s %12s %9s %9s %12s %9s %9s %8s\n", "", "user space", "local", "crossed", "workload", "local", "crossed", "reads")
	fmt.Fprintf(&t, "   %-36s %12s %9s %9s %12s %9s %9s %8s\n", "", "s", "%", "MB", "s", "%", "MB", "")
	for i, r := range rows {
		fmt.Fprintf(&t, "   %-36s %12.2f %9.0f %9.1f %12.2f %9.0f %9.1f %8.0f\n", bootWays[i].name,
			r.took[0], 100*r.local[0], r.crossed[0], r.took[1], 100*r.local[1], r.crossed[1], r.reads)
	}
	t.WriteString("   reads: of the guest that waited for the source; of qemu's way all that the source saw, with those of the stream\n")
	ours, local, plain, qemu := rows[0], rows[1], rows[2], rows[3]
	for i, moment := range []string{"user space", "workload"} {
		bound := bootBound(local, plain, i)
		fmt.Fprintf(&t, "   %-10s  %.2f s, goal %.2f s = %.1f x (%.2f s local + %.1f MB at %.0f MB/s): %s; %.2f x plain NBD, %.2f x qemu's way\n",
			moment, ours.took[i], bound, bootGoal, local.took[i], plain.crossed[i], bootRate/1e6, metOrMissed(ours.took[i] <= bound),
			ours.took[i]/plain.took[i], ours.took[i]/qemu.took[i])
	}
	fmt.Fprintf(&t, "   of ours %.0f reads waited, %.2f s altogether, %.0f ms each; nobody could know of them before, and a round trip is %d ms\n",
		ours.reads, ours.waited, 1e3*ours.waited/ours.reads, (2 * bootDelay).Milliseconds())
	return t.String()
}

func metOrMissed(met bool) string {
	if met {
		return "met"
	}
	return "missed"
}
