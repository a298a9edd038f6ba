package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestBootFiguresAreMediansEachByItself(t *testing.T) {
	m := bootMedian([]bootFigures{
		{took: [2]float64{1, 30}, local: [2]float64{0.1, 1}, crossed: [2]float64{5, 50}, bootReads: bootReads{7, 0.7}},
		{took: [2]float64{3, 10}, local: [2]float64{0.3, 0.5}, crossed: [2]float64{1, 70}, bootReads: bootReads{9, 0.9}},
		{took: [2]float64{2, 20}, local: [2]float64{0.2, 0.9}, crossed: [2]float64{3, 60}, bootReads: bootReads{8, 0.8}},
	})
	want := bootFigures{took: [2]float64{2, 20}, local: [2]float64{0.2, 0.9}, crossed: [2]float64{3, 60}, bootReads: bootReads{8, 0.8}}
	if m != want {
		t.Errorf("medians %v, want %v", m, want)
	}
}

func TestBootGoalIsALocalBootAndWhatItReads(t *testing.T) {
	rows := []bootFigures{
		{took: [2]float64{6, 20}, crossed: [2]float64{100, 400}, bootReads: bootReads{100, 4.5}},
		{took: [2]float64{4, 8}},
		{took: [2]float64{7, 40}, crossed: [2]float64{20, 40}},
		{took: [2]float64{8, 80}, crossed: [2]float64{30, 300}},
	}
	if got, want := bootBound(rows[1], rows[2], 0), 1.3*(4+1); got != want {
		t.Errorf("goal %v, want %v", got, want)
	}
	table := bootTable(rows)
	for _, want := range []string{
		"goal 6.50 s = 1.3 x (4.00 s local + 20.0 MB at 20 MB/s): met; 0.86 x plain NBD, 0.75 x qemu's way",
		"goal 13.00 s = 1.3 x (8.00 s local + 40.0 MB at 20 MB/s): missed; 0.50 x plain NBD, 0.25 x qemu's way",
		"of ours 100 reads waited, 4.50 s altogether, 45 ms each",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("there is no %q in\n%s", want, table)
		}
	}
	for _, w := range bootWays {
		if !strings.Contains(table, w.name) {
			t.Errorf("there is no row %q in\n%s", w.name, table)
		}
	}
}

func TestBootSumsAreOfFilesFromAllOverAndOfLargeOnes(t *testing.T) {
	trees := t.TempDir()
	write := func(name string, content string) {
		t.Helper()
		path := filepath.Join(trees, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	last := fmt.Sprint(bootTrees)
	for i := range 300 {
		write(fmt.Sprintf("1/src/a/%03d", i), "a")
	}
	write("1/src/a/large", strings.Repeat("x", 64<<10)) // none of the small ones
	for _, dir := range bootDirs {
		write(filepath.Join(last, dir, "file"), "hello\n")
		write(filepath.Join(last, dir, "empty"), "")
	}
	for _, name := range bootLarge {
		write(filepath.Join(last, name), strings.Repeat("x", 64<<10))
	}
	sums, err := bootSums(trees)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(sums), "\n")
	if want := bootSmall + len(bootDirs) + len(bootLarge); len(lines) != want {
		t.Errorf("%d sums, want %d", len(lines), want)
	}
	if want := "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03  " + last + "/src/net/file"; !slices.Contains(lines, want) {
		t.Errorf("there is no line %q in\n%s", want, sums)
	}
	if strings.Contains(sums, "/empty\n") {
		t.Error("an empty file is read")
	}
	for _, i := range []int{0, len(lines) - 1} {
		if name := lines[i][66:]; !strings.HasPrefix(name, "1/src/a/") {
			t.Errorf("read %d is of %s, want one of those from all over the disk", i, name)
		}
	}
}

func TestStatsOfNBDKitAreUnderstood(t *testing.T) {
	text := "total: 1103 ops, 12.103394 s, 43.20 MiB, 3.57 MiB/s\nread: 1082 ops, 0.05 s, 43.00 MiB, 3.5 MiB/s\n  Request size and alignment breakdown:\n"
	if n, err := statsReads(text); err != nil || n != 1082 {
		t.Errorf("%v reads, %v; want 1082", n, err)
	}
	if n, err := statsReads("total: 0 ops\n"); err == nil {
		t.Errorf("no line of reads, and yet %v", n)
	}
}

func TestMetricIsScraped(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "# TYPE a_count counter\na_count{disk=\"x y\"} 3\na_count{disk=\"z\"} 4\na_counter 100\nb 5\n")
	})}
	go server.Serve(ln)
	defer server.Close()
	for name, want := range map[string]float64{"a_count": 7, "b": 5} {
		if n, err := scrape(t.Context(), socket, name); err != nil || n != want {
			t.Errorf("%s is %v, %v; want %v", name, n, err, want)
		}
	}
	if n, err := scrape(t.Context(), socket, "a"); err == nil {
		t.Errorf("a metric that is not there is %v", n)
	}
}
