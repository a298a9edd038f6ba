package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// fioResult is what fio has seen of a load.
type fioResult struct {
	rate     float64 // operations per second; where they are of 1 MiB that is MiB per second
	bytes    float64
	p50, p99 float64 // of an operation, in microseconds
}

// fioFigures are those of several rounds.
type fioFigures struct{ rate, p50, p99, cpuPerGiB []float64 }

func (f *fioFigures) add(r fioResult, cpu time.Duration) {
	f.rate, f.p50, f.p99 = append(f.rate, r.rate), append(f.p50, r.p50), append(f.p99, r.p99)
	f.cpuPerGiB = append(f.cpuPerGiB, cpu.Seconds()*gib/r.bytes)
}

// fio puts a load on an export, over so many connections. It counts from the first operation on, so that its count
// goes with the CPU time that the server has taken.
func fio(ctx context.Context, uri string, l load, conns int, lasts time.Duration) (fioResult, error) {
	ctx, cancel := context.WithTimeout(ctx, lasts+time.Minute)
	defer cancel()
	out, _, err := output(ctx, "fio", "--name=load", "--ioengine=nbd", "--uri="+uri, "--rw="+l.rw, "--bs="+l.bs,
		fmt.Sprintf("--iodepth=%d", l.depth), fmt.Sprintf("--numjobs=%d", conns), "--group_reporting", "--time_based",
		fmt.Sprintf("--fsync=%d", l.fsync), fmt.Sprintf("--runtime=%dms", lasts.Milliseconds()), "--norandommap", "--randrepeat=0", "--fallocate=none",
		"--output-format=json")
	if err != nil {
		return fioResult{}, err
	}
	return parseFio(out)
}

// fioSide is what fio says of reads, or of writes.
type fioSide struct {
	IOPS    float64 `json:"iops"`
	Bytes   float64 `json:"io_bytes"`
	Latency struct {
		Percentile map[string]float64 `json:"percentile"`
	} `json:"clat_ns"`
}

// parseFio reads a report of one group of jobs that only read or only write. Lines for people may come before it.
func parseFio(out string) (fioResult, error) {
	var report struct {
		Jobs []struct {
			Error       int
			Read, Write fioSide
		} `json:"jobs"`
	}
	i := strings.IndexByte(out, '{')
	if i < 0 {
		return fioResult{}, fmt.Errorf("fio reports nothing: %.200q", out)
	}
	if err := json.Unmarshal([]byte(out[i:]), &report); err != nil {
		return fioResult{}, fmt.Errorf("fio's report: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return fioResult{}, errors.New("fio reports no job, or one that failed")
	}
	side := report.Jobs[0].Read
	if side.Bytes == 0 {
		side = report.Jobs[0].Write
	}
	if side.Bytes == 0 {
		return fioResult{}, errors.New("fio has moved no byte")
	}
	r := fioResult{rate: side.IOPS, bytes: side.Bytes}
	r.p50, r.p99 = side.Latency.Percentile["50.000000"]/1e3, side.Latency.Percentile["99.000000"]/1e3
	return r, nil
}

// cpu is the CPU time that a child has taken until now, of user and system together, to 10 ms.
func (c *child) cpu() (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// The name, in brackets, may have anything in it. utime and stime are fields 14 and 15, in ticks of 1/100 s.
	_, after, _ := strings.Cut(string(stat), ") ")
	f := strings.Fields(after)
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %.100q", c.cmd.Process.Pid, stat)
	}
	var user, system int64
	if _, err := fmt.Sscan(f[11]+" "+f[12], &user, &system); err != nil {
		return 0, err
	}
	return time.Duration(user+system) * 10 * time.Millisecond, nil
}
