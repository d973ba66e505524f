// Threads of one team that wait for one another (csrc/common/threads.h).
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "common/test.h"
#include "common/threads.h"

namespace {

// Every part writes what the next one reads after the meeting, and the last of all what the first begins with.
void rounds(int most, int count) {
  std::vector<int> written(size_t(std::max(most, 1)), 0);
  std::vector<int> wrong(written.size(), 0);
  std::atomic<int> came{0};
  fk::Meeting meeting;
  fk::team(most, [&](int part, int parts) {
    came++;
    unsigned round = 0;
    for (int i = 1; i <= count; i++) {
      written[size_t(part)] = i;
      meeting.wait(parts, &round);
      wrong[size_t(part)] += written[size_t((part + 1) % parts)] != i;
      meeting.wait(parts, &round);
    }
  });
  if (came < 1 || came > std::max(most, 1)) fail("threads", 0, came, most);
  for (size_t p = 0; p < wrong.size(); p++)
    if (wrong[p]) fail("rounds that another part was behind in", int64_t(p), wrong[p], 0);
}

}  // namespace

TEST(team) {
  for (int most : {0, 1, 2, 3, 16}) {  // 16: more than the processors of most machines
    CASE("a team of %d", most);
    rounds(most, most > 4 ? 50 : 2000);
  }
  CASE("teams of several callers at once");
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; c++) callers.emplace_back([] { rounds(3, 200); });
  for (std::thread& t : callers) t.join();
  CASE("a team inside another's work");
  fk::parallel(2, [](int) { rounds(2, 50); });
  if (kRacesOnly) return;  // threads after a fork: ThreadSanitizer refuses them
  CASE("a team in a forked child");
  const pid_t child = fork();
  if (child == 0) {
    int parts_there = 0;
    fk::team(3, [&](int, int parts) { parts_there = parts; });
    _Exit(parts_there);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 1)
    fail("threads", 0, status, 1);
}
