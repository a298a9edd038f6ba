package main

import (
	"math"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"
)

func TestPercentileLiesBetweenItsNeighbours(t *testing.T) {
	for _, c := range []struct {
		figures []float64
		p, want float64
	}{
		{[]float64{7}, 99, 7},
		{[]float64{3, 1, 2}, 50, 2},
		{[]float64{4, 1, 3, 2}, 50, 2.5},
		{[]float64{0, 100}, 99, 99},
		{[]float64{5, 1}, 100, 5},
	} {
		if got := percentile(c.figures, c.p); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("percentile %v of %v is %v, want %v", c.p, c.figures, got, c.want)
		}
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("the median of nothing is %v, want no number", got)
	}
}

func TestRatioIsOfRounds(t *testing.T) {
	// The machine was ten times slower in the second round.
	if got := ratio([]float64{90, 12, 100}, []float64{100, 10, 80}); math.Abs(got-1.2) > 1e-9 {
		t.Errorf("the ratio is %v, want 1.2", got)
	}
	if got := turns(1, 3); !slices.Equal(got, []int{2, 1, 0}) || !slices.Equal(turns(2, 3), []int{0, 1, 2}) {
		t.Errorf("the turns of round 1 are %v", got)
	}
}

func TestUnknownPartIsRefused(t *testing.T) {
	if all, err := choose(nil); err != nil || len(all) != len(parts) {
		t.Errorf("without a name: %d parts, %v; want all", len(all), err)
	}
	if some, err := choose([]string{"order", "stream"}); err != nil || len(some) != 2 || some[0].name != "order" {
		t.Errorf("two names: %v, %v", some, err)
	}
	if _, err := choose([]string{"strem"}); err == nil {
		t.Error("an unknown part was taken")
	}
}

func TestFioReportIsRead(t *testing.T) {
	side := func(iops, bytes string) string {
		return `{"io_bytes": ` + bytes + `, "iops": ` + iops +
			`, "clat_ns": {"percentile": {"50.000000": 25000, "99.000000": 180000}}}`
	}
	none := side("0", "0")
	for _, c := range []struct {
		out  string
		want fioResult
	}{
		{"a line for people\n" + `{"jobs": [{"error": 0, "read": ` + side("12000.5", "49152000") + `, "write": ` + none + `}]}`,
			fioResult{rate: 12000.5, bytes: 49152000, p50: 25, p99: 180}},
		{`{"jobs": [{"error": 0, "read": ` + none + `, "write": ` + side("1500", "1610612736") + `}]}`,
			fioResult{rate: 1500, bytes: 1610612736, p50: 25, p99: 180}},
	} {
		got, err := parseFio(c.out)
		if err != nil || got != c.want {
			t.Errorf("%+v, %v; want %+v", got, err, c.want)
		}
	}
	for _, out := range []string{"", "fio: no", "{", `{"jobs": []}`, `{"jobs": [{"error": 5, "read": ` + none + `, "write": ` + none + `}]}`,
		`{"jobs": [{"error": 0, "read": ` + none + `, "write": ` + none + `}]}`} {
		if got, err := parseFio(out); err == nil {
			t.Errorf("%q was taken for %+v", out, got)
		}
	}
}

func TestCPUTimeOfAProcessIsRead(t *testing.T) {
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	c := &child{cmd: &exec.Cmd{Process: self}}
	for began := time.Now(); time.Since(began) < 50*time.Millisecond; { // of CPU time, so that there is some
	}
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		t.Fatal(err)
	}
	want := time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	got, err := c.cpu()
	if err != nil || (got-want).Abs() > 40*time.Millisecond {
		t.Errorf("%v, %v; want %v, up to two ticks", got, err, want)
	}
}
